"""Decisions as they were made: recorded beside the answers, and told again in plain words."""
