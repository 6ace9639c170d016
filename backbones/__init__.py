"""Importing this package registers every model of the zoo with timm."""
