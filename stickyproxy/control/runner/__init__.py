"""The app processes that the proxy itself starts: started, watched, replaced and ended."""
