"""`adapmoe top`: a terminal view of a server's expert cache."""
