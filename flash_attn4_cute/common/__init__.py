"""Device code that every architecture family shares."""
