"""Command line of the plugin: `adapmoe`."""
