"""Replays of request traces in virtual time, on simulated GPUs."""
