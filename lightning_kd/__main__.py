from lightning_kd.cli import run

if __name__ == "__main__":
    run()
