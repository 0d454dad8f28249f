"""Datasets and tasks -> the columns that training and evaluation read."""
