"""DIFF-MF: difference-driven channel-spatial state space model for infrared-visible image fusion."""
