"""Processes: the fork server and what it forks, their channels, supervision, the executors."""
