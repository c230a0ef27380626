"""The domain: jobs, specs, storage, events, queue. Knows neither torch nor the web."""
