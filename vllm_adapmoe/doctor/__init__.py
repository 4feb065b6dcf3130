"""`adapmoe doctor`: what will and will not work on this machine."""
