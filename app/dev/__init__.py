"""The whole service on one machine: embedded servers and the supervisor behind `make run`."""
