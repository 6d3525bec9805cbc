"""The run's configuration: its schema, how it is read from YAML and overrides, what a model costs."""
