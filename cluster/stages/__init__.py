"""Stages: what one entry of ``stages:`` does; each file holds its configuration and the coroutine that runs it."""
