"""Runs on a real model, SmolLM2-135M-Instruct, and on people's preferences: see README.md."""
