"""Instances in processes of their own, on one machine or a Ray cluster."""
