"""The page: a local web server that answers clicks on images with masks."""
