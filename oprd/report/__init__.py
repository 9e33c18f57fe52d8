"""Reports of runs as a web page and pictures: what ``oprd-report`` shows."""
