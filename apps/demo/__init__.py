"""The demo: a web page to try controls on pictures, videos and questions."""
