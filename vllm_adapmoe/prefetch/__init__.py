"""Who is needed next: predictions from the next layers' own gates, and what to fetch for them."""
