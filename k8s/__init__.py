"""What runs the service on Kubernetes, and what generates some of it."""
