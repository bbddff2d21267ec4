"""Scores of tracking results by the rules of four toolkits, which differ, and their plots."""
