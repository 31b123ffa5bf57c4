"""What the commands of bench/ share: cases, contenders, clocks, tables."""
