"""What every client of FedKSeed does alike, with torch or without: the seeds, the order of the data, and the steps."""
