"""What clients speak to: OpenAI-compatible HTTP and gRPC, and the Ray Serve application."""
