"""The part of vLLM that rollout.Server talks to, for tests where vLLM is not installed."""
