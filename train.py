"""Train an autoencoder or a latent diffusion model: compose, check, build, fit. The same command continues its run."""

from pathlib import Path

from omegaconf import DictConfig

from ldm import config
from ldm.training import interrupt


@config.entry_point("train", prepare=config.register_networks)
def main(cfg: DictConfig) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from ldm.training import checkpointing, initialize, lock, session
    from ldm.training.loggers import JsonlLogger

    session.quiet()
    pl.seed_everything(cfg.seed, verbose=False)
    module, data = config.build(cfg.model), config.build(cfg.data)
    callbacks = config.build_each(cfg.callbacks)
    run_dir = Path(cfg.run_dir)
    with lock.owned(run_dir):
        if rank_zero_only.rank == 0:  # each rank is a process of its own, started by srun, torchrun or Lightning
            config.open_run(cfg)
        log = JsonlLogger(run_dir, cfg.data.batch_size)
        loggers = [config.build(cfg.logger)] if cfg.logger else []
        trainer = config.build(cfg.trainer, callbacks=callbacks, logger=[log, *loggers])
        interrupt.keep_lightning_out(trainer)

        for logger in loggers:
            logger.log_hyperparams(config.plain(cfg))

        resume = checkpointing.resume_from(run_dir, cfg.resume)
        step = 0 if resume is None else checkpointing.step_of(resume)
        if resume is None and cfg.init_from:
            initialize.start_from(module, config.averaged_weights(cfg.init_from), cfg.init_from)
        log.resume(step)
        session.banner(cfg.name, run_dir, module, data, trainer, step, resume or cfg.init_from)
        if step < trainer.max_steps:
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        session.farewell(run_dir, trainer)


if __name__ == "__main__":
    interrupt.listen()
    main()
