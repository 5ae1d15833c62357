// SPDX-License-Identifier: GPL-2.0-only

//! Format NONE: all of the range but its superblocks is RAM.

use super::{
    pool::Pool,
    Contents,
    Format,
    Instance,
    Setting, //
};
use crate::{
    kapi::hotplug::Memory,
    pmem_core::{
        kmem::{
            layout::{
                self,
                Layout, //
            },
            superblock, //
        },
        medium::Medium, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

pub(super) struct None;

impl Format for None {
    fn kind(&self) -> superblock::Format {
        superblock::Format::None
    }

    fn layout(&self, pages: u64) -> Result<Layout, layout::Error> {
        Layout::none(pages)
    }

    fn probe(&self, _name: &CStr, _medium: &dyn Medium, layout: &Layout) -> Result<Contents> {
        Contents::new(layout)
    }

    fn start(
        &self,
        setting: &Setting,
        memory: Arc<Memory>,
        layout: Layout,
        _contents: Contents,
    ) -> Result<KBox<dyn Instance>> {
        let pool = Pool::new(memory, setting.shared.queue.clone(), &layout)?;
        Ok(KBox::new(Idle(pool), GFP_KERNEL)?)
    }
}

struct Idle(Arc<Pool>);

impl Instance for Idle {
    fn pool(&self) -> &Arc<Pool> {
        &self.0
    }

    fn close(&self) -> bool {
        true
    }

    fn reopen(&self) {}
}
