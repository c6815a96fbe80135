"""Pieces that know neither the database nor the queue."""
