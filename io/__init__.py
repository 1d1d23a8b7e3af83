"""Where rows come from and where they go: logs, tables and stores."""
