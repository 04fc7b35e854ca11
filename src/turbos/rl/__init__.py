"""Reinforcement from checked answers: rollout, advantage, loss, loop."""
