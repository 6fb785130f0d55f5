"""From files to rows: each file is identified, decoded once, and analysed stage by stage."""
