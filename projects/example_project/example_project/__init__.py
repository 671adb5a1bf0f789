"""A package that uses msda_plugin only through the registry."""
