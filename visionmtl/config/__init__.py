"""Settings: specs chosen by `type:`, and YAML files merged with overrides."""
