"""The package's version, for modules that are imported before the package is complete."""

__version__ = "0.1.0"
