"""Reading and writing of prompts, tables, images and videos."""
