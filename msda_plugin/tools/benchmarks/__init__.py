"""What `python -m msda_plugin benchmark` can time: one module a subject."""
