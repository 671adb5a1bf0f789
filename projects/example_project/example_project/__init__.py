"""A package that uses msda_plugin by registry lookup alone."""
