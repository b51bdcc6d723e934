"""Train an autoencoder or a latent diffusion model: compose, check, build, fit. The same command continues its run."""

from omegaconf import DictConfig

from ldm import config


@config.entry_point("train")
def main(cfg: DictConfig) -> None:
    import pytorch_lightning as pl

    from ldm.training import checkpointing, session
    from ldm.training.loggers import JsonlLogger

    session.quiet()
    pl.seed_everything(cfg.seed, verbose=False)
    module, data = config.build(cfg.model), config.build(cfg.data)
    callbacks = config.build_each(cfg.callbacks)
    run_dir = config.open_run(cfg)
    log = JsonlLogger(run_dir, cfg.data.batch_size)
    loggers = [config.build(cfg.logger)] if cfg.logger else []
    trainer = config.build(cfg.trainer, callbacks=callbacks, logger=[log, *loggers])

    for logger in loggers:
        logger.log_hyperparams(config.plain(cfg))

    resume = checkpointing.newest(run_dir)
    step = 0 if resume is None else checkpointing.read(resume)["global_step"]
    log.resume(step)
    session.banner(cfg.name, run_dir, module, data, trainer, step)
    if step < trainer.max_steps:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    session.farewell(run_dir, trainer)


if __name__ == "__main__":
    main()
