"""List the recipes that come with this package, or copy one."""
