"""The worker: claims jobs from SQL and runs them on a device."""
