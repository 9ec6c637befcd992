"""Responses of any checkpoint to any file of prompts."""
