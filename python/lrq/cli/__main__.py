from lrq.cli import main

main()
