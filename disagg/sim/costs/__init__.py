"""Cost models: how many seconds one engine step takes on given hardware."""
