"""Plugins that break the contract, each in one way."""
