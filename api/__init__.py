"""The REST API: accepts jobs, shows them, and never does model work."""
