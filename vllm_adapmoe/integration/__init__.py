"""The only package that imports vLLM: how it finds us, and what we put in its places."""
