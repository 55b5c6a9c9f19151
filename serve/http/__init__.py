"""The server's HTTP face: OpenAI's API, metrics and the live page."""
