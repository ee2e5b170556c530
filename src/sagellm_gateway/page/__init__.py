"""The web page's files; `routes/page.py` serves them."""
