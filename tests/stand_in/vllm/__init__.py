"""Stands in for the part of vLLM that server.Server uses, in tests without vLLM."""
