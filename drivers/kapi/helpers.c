// SPDX-License-Identifier: GPL-2.0-only
/*
 * What C headers keep inline or in macros, as functions for Rust.
 */

#include <linux/blkdev.h>
#include <linux/dax.h>
#include <linux/debugfs.h>
#include <linux/device.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/kasan.h>
#include <linux/kmemleak.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/numa.h>
#include <linux/page-flags.h>
#include <linux/pageblock-flags.h>
#include <linux/pci.h>
#include <linux/pci-p2pdma.h>
#include <linux/percpu.h>
#include <linux/platform_device.h>
#include <linux/sched.h>
#include <linux/scatterlist.h>
#include <linux/set_memory.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "bindings_helper.h"

#ifdef CONFIG_X86
#include <asm/cpufeature.h>

bool pmem_helper_cpu_has_clwb(void)
{
	return boot_cpu_has(X86_FEATURE_CLWB);
}

bool pmem_helper_cpu_has_clflushopt(void)
{
	return boot_cpu_has(X86_FEATURE_CLFLUSHOPT);
}
#else
bool pmem_helper_cpu_has_clwb(void)
{
	return false;
}

bool pmem_helper_cpu_has_clflushopt(void)
{
	return false;
}
#endif

unsigned int pmem_helper_cpu(void)
{
	return raw_smp_processor_id();
}

int pmem_helper_phys_to_online_node(phys_addr_t start)
{
	return numa_map_to_online_node(phys_to_target_node(start));
}

int pmem_helper_dev_to_online_node(struct device *dev)
{
	return numa_map_to_online_node(dev_to_node(dev));
}

void *pmem_helper_page_address(const struct page *page)
{
	return page_address(page);
}

void pmem_helper_sysfs_attr_init(struct attribute *attr)
{
	sysfs_attr_init(attr);
}

void pmem_helper_dev_set_drvdata(struct device *dev, void *data)
{
	dev_set_drvdata(dev, data);
}

void *pmem_helper_dev_get_drvdata(const struct device *dev)
{
	return dev_get_drvdata(dev);
}

struct dentry *pmem_helper_debugfs_create_dir(const char *name, struct dentry *parent)
{
	return debugfs_create_dir(name, parent);
}

struct dentry *pmem_helper_debugfs_create_file(const char *name, umode_t mode,
					       struct dentry *parent, void *data,
					       const struct file_operations *fops)
{
	return debugfs_create_file(name, mode, parent, data, fops);
}

void pmem_helper_debugfs_remove(struct dentry *dentry)
{
	debugfs_remove(dentry);
}

unsigned long pmem_helper_percpu_alloc(size_t size, size_t align)
{
	return (__force unsigned long)__alloc_percpu(size, align);
}

void pmem_helper_percpu_free(unsigned long percpu)
{
	free_percpu((__force void __percpu *)percpu);
}

void pmem_helper_percpu_add(unsigned long percpu, u64 n)
{
	this_cpu_add(*(__force u64 __percpu *)percpu, n);
}

u64 pmem_helper_percpu_sum(unsigned long percpu)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(*per_cpu_ptr((__force u64 __percpu *)percpu, cpu));
	return sum;
}

bool pmem_helper_platform_is_bound(const char *name)
{
	struct device *dev = bus_find_device_by_name(&platform_bus_type, NULL, name);
	bool bound;

	if (!dev)
		return false;
	/* A driver that is in its probe() has the lock. */
	device_lock(dev);
	bound = dev->driver;
	device_unlock(dev);
	put_device(dev);
	return bound;
}

#ifdef PMEM_DAX_BUS
bool pmem_helper_dev_dax_range(const struct dev_dax *dev_dax, struct range *range)
{
	if (dev_dax->nr_range != 1)
		return false;
	*range = dev_dax->ranges[0].range;
	return true;
}

struct device *pmem_helper_dev_dax_device(struct dev_dax *dev_dax)
{
	return &dev_dax->dev;
}

struct dax_device_driver *pmem_helper_dev_dax_driver(const struct dev_dax *dev_dax)
{
	return container_of(dev_dax->dev.driver, struct dax_device_driver, drv);
}
#endif

#ifdef PMEM_KERNEL_7_2
unsigned long pmem_helper_spin_lock_irqsave(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

bool pmem_helper_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags)
{
	return spin_trylock_irqsave(lock, *flags);
}

void pmem_helper_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}
#endif

struct kernfs_node *pmem_helper_disk_badblocks_file(struct gendisk *disk)
{
	return sysfs_get_dirent(disk_to_dev(disk)->kobj.sd, "badblocks");
}

int pmem_helper_clear_mce_nospec(unsigned long pfn)
{
	return clear_mce_nospec(pfn);
}

void pmem_helper_clear_page_hwpoison(unsigned long pfn)
{
#ifdef CONFIG_MEMORY_FAILURE
	TestClearPageHWPoison(pfn_to_page(pfn));
#endif
}

#if IS_BUILTIN(CONFIG_KUNIT)
/* A plain copy would not: it is what machines without any of these get. */
bool pmem_helper_copy_survives_faults(void)
{
#ifdef CONFIG_X86
	return IS_ENABLED(CONFIG_ARCH_HAS_COPY_MC) && boot_cpu_has(X86_FEATURE_ERMS);
#else
	return false;
#endif
}

int pmem_helper_set_mce_nospec(unsigned long pfn)
{
	return set_mce_nospec(pfn);
}
#endif

/*
 * The first page from start on that a file has in a DAX mapping, with a reference to the inode; NULL if
 * that is going, or if more than one file has the page.
 *
 * Who frees an inode takes its pages away before, and RCU keeps it until there is our reference.
 */
unsigned long pmem_helper_next_dax_page(unsigned long start, unsigned long end,
					struct inode **inode)
{
	unsigned long pfn;

	*inode = NULL;
	for (pfn = start; pfn < end; pfn++) {
		struct page *page = pfn_to_page(pfn);
		struct folio *folio = (struct folio *)page;
		struct address_space *mapping;

		if (!(pfn % pageblock_nr_pages))
			cond_resched();
		if (PageTail(page))
			continue;
		rcu_read_lock();
		mapping = READ_ONCE(folio->mapping);
		if (mapping)
			*inode = igrab(mapping->host);
		rcu_read_unlock();
		if (mapping || READ_ONCE(folio->share))
			break;
	}
	return pfn;
}

/* A fault of the file that has its page already has its place as well when the lock is ours. */
void pmem_helper_break_dax_layout(struct inode *inode)
{
	filemap_invalidate_lock(inode->i_mapping);
	dax_break_layout_final(inode);
	filemap_invalidate_unlock(inode->i_mapping);
}

unsigned long pmem_helper_pci_resource(struct pci_dev *pdev, u32 bar, u64 *start, u64 *size, u64 *bus)
{
	*start = pci_resource_start(pdev, bar);
	*size = pci_resource_len(pdev, bar);
	*bus = pci_bus_address(pdev, bar);
	return pci_resource_flags(pdev, bar);
}

bool pmem_helper_pci_is_disconnected(const struct pci_dev *pdev)
{
	return pci_dev_is_disconnected(pdev);
}

int pmem_helper_pci_add_p2pdma(struct pci_dev *pdev, u32 bar, size_t size, u64 offset)
{
	int ret = pci_p2pdma_add_resource(pdev, bar, size, offset);

	if (!ret)
		pci_p2pmem_publish(pdev, true);
	return ret;
}

#if IS_ENABLED(CONFIG_VIRTIO)
const char *pmem_helper_virtio_name(struct virtio_device *vdev)
{
	return dev_name(&vdev->dev);
}

struct virtio_driver *pmem_helper_virtio_driver(struct virtio_device *vdev)
{
	return drv_to_virtio(vdev->dev.driver);
}

void **pmem_helper_virtio_priv(struct virtio_device *vdev)
{
	return &vdev->priv;
}

bool pmem_helper_virtio_has_feature(const struct virtio_device *vdev, unsigned int bit)
{
	return __virtio_test_bit(vdev, bit);
}

void pmem_helper_virtio_clear_feature(struct virtio_device *vdev, unsigned int bit)
{
	__virtio_clear_bit(vdev, bit);
}

int pmem_helper_virtio_cread_le64(struct virtio_device *vdev, unsigned int offset, u64 *value)
{
	__le64 raw;

	if (!vdev->config->get)
		return -ENODEV;
	__virtio_cread_many(vdev, offset, &raw, 1, sizeof(raw));
	*value = le64_to_cpu(raw);
	return 0;
}

bool pmem_helper_virtio_shm_region(struct virtio_device *vdev, struct virtio_shm_region *region,
				   u8 id)
{
	return virtio_get_shm_region(vdev, region, id);
}

bool pmem_helper_virtio_needs_reset(struct virtio_device *vdev)
{
	return vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_NEEDS_RESET;
}

void pmem_helper_virtio_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

struct virtqueue *pmem_helper_virtio_find_vq(struct virtio_device *vdev, vq_callback_t *callback,
					     const char *name)
{
	return virtio_find_single_vq(vdev, callback, name);
}

void pmem_helper_virtio_synchronize_cbs(struct virtio_device *vdev)
{
	virtio_synchronize_cbs(vdev);
}

void pmem_helper_virtio_del_vqs(struct virtio_device *vdev)
{
	vdev->config->del_vqs(vdev);
}

int pmem_helper_virtqueue_add(struct virtqueue *vq, void *out, unsigned int out_len, void *in,
			      unsigned int in_len, void *token)
{
	struct scatterlist request, response, *sgs[] = { &request, &response };

	sg_init_one(&request, out, out_len);
	sg_init_one(&response, in, in_len);
	return virtqueue_add_sgs(vq, sgs, 1, 1, token, GFP_ATOMIC);
}

void pmem_helper_kmemleak_not_leak(const void *ptr)
{
	kmemleak_not_leak(ptr);
}

#if IS_BUILTIN(CONFIG_KUNIT)
void pmem_helper_virtio_simulate(struct virtio_device *vdev, u32 device,
				 const struct virtio_config_ops *config,
				 void (*release)(struct device *dev))
{
	vdev->id.device = device;
	vdev->config = config;
	vdev->dev.release = release;
}

struct device *pmem_helper_virtio_dev(struct virtio_device *vdev)
{
	return &vdev->dev;
}

struct virtio_device *pmem_helper_virtio_of(struct device *dev)
{
	return dev_to_virtio(dev);
}

u64 pmem_helper_virtio_features(const struct virtio_device *vdev)
{
	return vdev->features;
}

bool pmem_helper_virtio_is_bound(struct virtio_device *vdev)
{
	bool bound;

	/* A driver that is in its probe() has the lock. */
	device_lock(&vdev->dev);
	bound = vdev->dev.driver;
	device_unlock(&vdev->dev);
	return bound;
}
#endif
#endif

void pmem_helper_disk_lock_open(struct gendisk *disk)
{
	mutex_lock(&disk->open_mutex);
}

void pmem_helper_disk_unlock_open(struct gendisk *disk)
{
	mutex_unlock(&disk->open_mutex);
}

unsigned int pmem_helper_disk_openers(struct gendisk *disk)
{
	return disk_openers(disk);
}

bool pmem_helper_node_possible(int nid)
{
	return nid >= 0 && nid < MAX_NUMNODES && node_possible(nid);
}

unsigned long pmem_helper_node_present_pages(int nid)
{
	return NODE_DATA(nid) ? node_present_pages(nid) : 0;
}

struct page *pmem_helper_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long pmem_helper_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

void *pmem_helper_phys_to_virt(phys_addr_t phys)
{
	return phys_to_virt(phys);
}

enum zone_type pmem_helper_page_zonenum(const struct page *page)
{
	return page_zonenum(page);
}

void pmem_helper_set_page_offline(struct page *page)
{
	__SetPageOffline(page);
}

void pmem_helper_clear_page_offline(struct page *page)
{
	__ClearPageOffline(page);
}

/*
 * KASAN's shadow of memory that comes online has anything in it, until the page allocator gives a
 * page to somebody. Pages that are held back from it must not wait for that.
 */
void pmem_helper_kasan_unpoison_pages(const struct page *page, unsigned long count)
{
#ifdef CONFIG_KASAN_GENERIC
	__memset(kasan_mem_to_shadow(page_address(page)), 0,
		 count << (PAGE_SHIFT - KASAN_SHADOW_SCALE_SHIFT));
#endif
}

void pmem_helper_set_page_dirty(struct page *page)
{
	SetPageDirty(page);
}

bool pmem_helper_test_clear_page_dirty(struct page *page)
{
	return TestClearPageDirty(page);
}

bool pmem_helper_page_ref_dec_and_test(struct page *page)
{
	return page_ref_dec_and_test(page);
}

void pmem_helper_page_ref_inc(struct page *page)
{
	page_ref_inc(page);
}

void pmem_helper_set_page_private(struct page *page, unsigned long private)
{
	set_page_private(page, private);
}

unsigned long pmem_helper_page_private(const struct page *page)
{
	return page_private(page);
}

struct page *pmem_helper_alloc_page_node(int nid, gfp_t gfp)
{
	return alloc_pages_node(nid, gfp, 0);
}

void pmem_helper_free_page(struct page *page)
{
	__free_page(page);
}

int pmem_helper_alloc_contig_range(unsigned long start, unsigned long end, gfp_t gfp)
{
	return alloc_contig_range(start, end, ACR_FLAGS_NONE, gfp);
}

static bool page_is_anonymous(struct page *page)
{
	struct folio *folio;

	if (!PageLRU(page))
		return false;
	folio = page_folio(page);
	return folio_test_anon(folio) && !folio_test_swapcache(folio) &&
	       !folio_test_writeback(folio);
}

/* In the page allocator's lists, or in those of a CPU, which alloc_contig_range() drains. */
static bool page_is_free(struct page *page)
{
	return PageBuddy(page) ||
	       (!page_ref_count(page) && !PageCompound(page) && !page_has_type(page));
}

/* Looks without a reference or lock: what it sees is a hint. */
unsigned long pmem_helper_next_pages(unsigned long start, unsigned long end, bool free,
				     unsigned long *count)
{
	bool (*match)(struct page *page) = free ? page_is_free : page_is_anonymous;
	unsigned long pfn, stop;

	*count = 0;
	for (pfn = start; pfn < end && !match(pfn_to_page(pfn)); pfn++)
		if (!(pfn % pageblock_nr_pages))
			cond_resched();
	if (pfn >= end)
		return end;
	stop = min(end, pageblock_end_pfn(pfn));
	while (pfn + *count < stop && match(pfn_to_page(pfn + *count)))
		++*count;
	return pfn;
}
