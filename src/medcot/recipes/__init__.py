"""The shipped recipes, as YAML files."""
