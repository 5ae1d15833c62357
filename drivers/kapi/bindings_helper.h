/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What bindgen reads: the headers, constants that are casts in C and so are not seen by it, and the
 * prototypes of helpers.c.
 */
#ifndef PMEM_BINDINGS_HELPER_H
#define PMEM_BINDINGS_HELPER_H

#include <linux/badblocks.h>
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/dax.h>
#include <linux/io.h>
#include <linux/kernfs.h>
#include <linux/memory.h>
#include <linux/memory-tiers.h>
#include <linux/pci.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#if IS_BUILTIN(CONFIG_KUNIT)
#include <linux/virtio_ring.h>
#endif
#ifdef PMEM_DAX_BUS
#include <dax-private.h>
#include <bus.h>
#endif

/* An external build has no .config entry for the driver. */
#ifndef CONFIG_BLK_DEV_RUST_PMEM_START
#define CONFIG_BLK_DEV_RUST_PMEM_START ""
#define CONFIG_BLK_DEV_RUST_PMEM_SIZE ""
#define CONFIG_BLK_DEV_RUST_PMEM_COUNT "1"
#endif

#define PMEM_DEFAULT_START CONFIG_BLK_DEV_RUST_PMEM_START
#define PMEM_DEFAULT_SIZE CONFIG_BLK_DEV_RUST_PMEM_SIZE
#define PMEM_DEFAULT_COUNT CONFIG_BLK_DEV_RUST_PMEM_COUNT

#define PMEM_CONST(type, name) static const type PMEM_CONST_##name = name

PMEM_CONST(blk_features_t, BLK_FEAT_WRITE_CACHE);
PMEM_CONST(blk_features_t, BLK_FEAT_FUA);
PMEM_CONST(blk_features_t, BLK_FEAT_IO_STAT);
PMEM_CONST(blk_features_t, BLK_FEAT_SYNCHRONOUS);
PMEM_CONST(blk_features_t, BLK_FEAT_NOWAIT);
PMEM_CONST(blk_features_t, BLK_FEAT_DAX);
PMEM_CONST(blk_features_t, BLK_FEAT_ATOMIC_WRITES);

PMEM_CONST(blk_status_t, BLK_STS_NOTSUPP);
PMEM_CONST(blk_status_t, BLK_STS_IOERR);
PMEM_CONST(blk_status_t, BLK_STS_NOSPC);
PMEM_CONST(blk_status_t, BLK_STS_AGAIN);

PMEM_CONST(gfp_t, GFP_NOIO);
PMEM_CONST(gfp_t, GFP_NOWAIT);
PMEM_CONST(gfp_t, __GFP_HIGHMEM);
PMEM_CONST(gfp_t, __GFP_MEMALLOC);
PMEM_CONST(gfp_t, __GFP_MOVABLE);
PMEM_CONST(gfp_t, __GFP_NOMEMALLOC);
PMEM_CONST(gfp_t, __GFP_NORETRY);
PMEM_CONST(gfp_t, __GFP_NOWARN);
PMEM_CONST(gfp_t, __GFP_RETRY_MAYFAIL);
PMEM_CONST(gfp_t, __GFP_THISNODE);

PMEM_CONST(int, MEMTIER_ADISTANCE_DRAM);
PMEM_CONST(mhp_t, MHP_NID_IS_MGID);
PMEM_CONST(unsigned long, MEMREMAP_WB);
PMEM_CONST(unsigned long, MEMREMAP_WC);
PMEM_CONST(unsigned long, MEMREMAP_WT);
PMEM_CONST(unsigned int, MAX_PAGE_ORDER);

PMEM_CONST(blk_opf_t, REQ_OP_MASK);
PMEM_CONST(blk_opf_t, REQ_PREFLUSH);
PMEM_CONST(blk_opf_t, REQ_NOWAIT);
PMEM_CONST(blk_opf_t, REQ_NOUNMAP);
PMEM_CONST(blk_opf_t, REQ_FUA);
#if IS_BUILTIN(CONFIG_KUNIT)
PMEM_CONST(blk_mode_t, BLK_OPEN_READ);
PMEM_CONST(blk_mode_t, BLK_OPEN_WRITE);
#endif

bool pmem_helper_cpu_has_clwb(void);
bool pmem_helper_cpu_has_clflushopt(void);
unsigned int pmem_helper_cpu(void);
int pmem_helper_phys_to_online_node(phys_addr_t start);
int pmem_helper_dev_to_online_node(struct device *dev);
void *pmem_helper_page_address(const struct page *page);

/* attribute.rs */
void pmem_helper_sysfs_attr_init(struct attribute *attr);
void pmem_helper_dev_set_drvdata(struct device *dev, void *data);
void *pmem_helper_dev_get_drvdata(const struct device *dev);

/* debugfs.rs */
struct dentry *pmem_helper_debugfs_create_dir(const char *name, struct dentry *parent);
struct dentry *pmem_helper_debugfs_create_file(const char *name, umode_t mode,
					       struct dentry *parent, void *data,
					       const struct file_operations *fops);
void pmem_helper_debugfs_remove(struct dentry *dentry);

/* percpu.rs: as in Rust, per-CPU memory is a number here, not the address that it is not. */
unsigned long pmem_helper_percpu_alloc(size_t size, size_t align);
void pmem_helper_percpu_free(unsigned long percpu);
void pmem_helper_percpu_add(unsigned long percpu, u64 n);
u64 pmem_helper_percpu_sum(unsigned long percpu);

/* platform.rs */
bool pmem_helper_platform_is_bound(const char *name);

#ifdef PMEM_DAX_BUS
/* daxbus.rs */
bool pmem_helper_dev_dax_range(const struct dev_dax *dev_dax, struct range *range);
struct device *pmem_helper_dev_dax_device(struct dev_dax *dev_dax);
struct dax_device_driver *pmem_helper_dev_dax_driver(const struct dev_dax *dev_dax);
#endif

#ifdef PMEM_KERNEL_7_2
/* compat/v7_2.rs */
unsigned long pmem_helper_spin_lock_irqsave(spinlock_t *lock);
bool pmem_helper_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags);
void pmem_helper_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);
#endif

/* badblocks.rs */
struct kernfs_node *pmem_helper_disk_badblocks_file(struct gendisk *disk);

/* disk.rs */
void pmem_helper_disk_lock_open(struct gendisk *disk);
void pmem_helper_disk_unlock_open(struct gendisk *disk);
unsigned int pmem_helper_disk_openers(struct gendisk *disk);

/* mapping.rs */
int pmem_helper_clear_mce_nospec(unsigned long pfn);
void pmem_helper_clear_page_hwpoison(unsigned long pfn);
unsigned long pmem_helper_next_dax_page(unsigned long start, unsigned long end,
					struct inode **inode);
void pmem_helper_break_dax_layout(struct inode *inode);
#if IS_BUILTIN(CONFIG_KUNIT)
bool pmem_helper_copy_survives_faults(void);
int pmem_helper_set_mce_nospec(unsigned long pfn);
#endif

/* pci.rs */
unsigned long pmem_helper_pci_resource(struct pci_dev *pdev, u32 bar, u64 *start, u64 *size, u64 *bus);
bool pmem_helper_pci_is_disconnected(const struct pci_dev *pdev);
int pmem_helper_pci_add_p2pdma(struct pci_dev *pdev, u32 bar, size_t size, u64 offset);

#if IS_ENABLED(CONFIG_VIRTIO)
/* virtio.rs */
const char *pmem_helper_virtio_name(struct virtio_device *vdev);
struct virtio_driver *pmem_helper_virtio_driver(struct virtio_device *vdev);
void **pmem_helper_virtio_priv(struct virtio_device *vdev);
bool pmem_helper_virtio_has_feature(const struct virtio_device *vdev, unsigned int bit);
void pmem_helper_virtio_clear_feature(struct virtio_device *vdev, unsigned int bit);
int pmem_helper_virtio_cread_le64(struct virtio_device *vdev, unsigned int offset, u64 *value);
bool pmem_helper_virtio_shm_region(struct virtio_device *vdev, struct virtio_shm_region *region,
				   u8 id);
bool pmem_helper_virtio_needs_reset(struct virtio_device *vdev);
void pmem_helper_virtio_ready(struct virtio_device *vdev);
struct virtqueue *pmem_helper_virtio_find_vq(struct virtio_device *vdev, vq_callback_t *callback,
					     const char *name);
void pmem_helper_virtio_synchronize_cbs(struct virtio_device *vdev);
void pmem_helper_virtio_del_vqs(struct virtio_device *vdev);
int pmem_helper_virtqueue_add(struct virtqueue *vq, void *out, unsigned int out_len, void *in,
			      unsigned int in_len, void *token);
void pmem_helper_kmemleak_not_leak(const void *ptr);

#if IS_BUILTIN(CONFIG_KUNIT)
/* kunit/virtio.rs */
void pmem_helper_virtio_simulate(struct virtio_device *vdev, u32 device,
				 const struct virtio_config_ops *config,
				 void (*release)(struct device *dev));
struct device *pmem_helper_virtio_dev(struct virtio_device *vdev);
struct virtio_device *pmem_helper_virtio_of(struct device *dev);
u64 pmem_helper_virtio_features(const struct virtio_device *vdev);
bool pmem_helper_virtio_is_bound(struct virtio_device *vdev);
#endif
#endif

/* hotplug.rs */
bool pmem_helper_node_possible(int nid);
unsigned long pmem_helper_node_present_pages(int nid);
struct page *pmem_helper_pfn_to_page(unsigned long pfn);
unsigned long pmem_helper_page_to_pfn(const struct page *page);
void *pmem_helper_phys_to_virt(phys_addr_t phys);
enum zone_type pmem_helper_page_zonenum(const struct page *page);
void pmem_helper_set_page_offline(struct page *page);
void pmem_helper_clear_page_offline(struct page *page);
void pmem_helper_kasan_unpoison_pages(const struct page *page, unsigned long count);
void pmem_helper_set_page_dirty(struct page *page);
bool pmem_helper_test_clear_page_dirty(struct page *page);
bool pmem_helper_page_ref_dec_and_test(struct page *page);
void pmem_helper_page_ref_inc(struct page *page);
void pmem_helper_set_page_private(struct page *page, unsigned long private);
unsigned long pmem_helper_page_private(const struct page *page);
struct page *pmem_helper_alloc_page_node(int nid, gfp_t gfp);
void pmem_helper_free_page(struct page *page);
int pmem_helper_alloc_contig_range(unsigned long start, unsigned long end, gfp_t gfp);
unsigned long pmem_helper_next_pages(unsigned long start, unsigned long end, bool free,
				     unsigned long *count);

#endif /* PMEM_BINDINGS_HELPER_H */
