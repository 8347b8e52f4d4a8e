//! Safetensors files that are either complete or not there.

use crate::CalibrationError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

/// Numbers with a shape.
pub(crate) struct Array<T> {
    pub shape: Vec<usize>,
    pub values: Vec<T>,
}

/// A file's tensors and metadata.
#[derive(Default)]
pub(crate) struct Contents {
    pub metadata: HashMap<String, String>,
    pub floats: Vec<(String, Array<f32>)>,
    pub doubles: Vec<(String, Array<f64>)>,
    pub integers: Vec<(String, Array<u32>)>,
}

/// Largest file that is read; what calibration makes is far smaller.
const MAX_BYTES: u64 = 8 << 30;

impl Contents {
    /// Writes the file beside its place, makes it durable and moves it there.
    pub(crate) fn write(&self, path: &Path) -> Result<(), CalibrationError> {
        let problem = |source| CalibrationError::Write { path: path.to_owned(), source };
        let mut tensors: Vec<(&str, Dtype, &[usize], Vec<u8>)> = Vec::new();
        for (name, array) in &self.floats {
            tensors.push((name, Dtype::F32, &array.shape, array.values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        }
        for (name, array) in &self.doubles {
            tensors.push((name, Dtype::F64, &array.shape, array.values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        }
        for (name, array) in &self.integers {
            tensors.push((name, Dtype::U32, &array.shape, array.values.iter().flat_map(|x| x.to_le_bytes()).collect()));
        }
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.to_vec(), bytes).expect("as many bytes as the shape says");
            (*name, view)
        });
        let bytes = safetensors::serialize(views, Some(self.metadata.clone()))
            .map_err(|error| problem(std::io::Error::other(error.to_string())))?;
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".dibit-");
        // As for every new file, the umask decides what of this is left.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(directory).map_err(problem)?;
        file.write_all(&bytes).map_err(problem)?;
        file.as_file().sync_all().map_err(problem)?;
        file.persist(path).map_err(|error| problem(error.error))?;
        Ok(())
    }

    pub(crate) fn read(path: &Path) -> Result<Self, CalibrationError> {
        let problem = |source| CalibrationError::Read { path: path.to_owned(), source };
        let malformed = |problem: String| CalibrationError::Malformed { path: path.to_owned(), problem };
        let size = std::fs::metadata(path).map_err(problem)?.len();
        if size > MAX_BYTES {
            return Err(malformed(format!("it has {size} bytes")));
        }
        let bytes = std::fs::read(path).map_err(problem)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| malformed(error.to_string()))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
        let mut contents = Contents { metadata: header.metadata().clone().unwrap_or_default(), ..Contents::default() };
        for (name, view) in tensors.iter() {
            let (name, shape) = (name.to_owned(), view.shape().to_vec());
            match view.dtype() {
                Dtype::F32 => {
                    contents.floats.push((name, Array { shape, values: numbers(view.data(), f32::from_le_bytes) }))
                }
                Dtype::F64 => {
                    contents.doubles.push((name, Array { shape, values: numbers(view.data(), f64::from_le_bytes) }));
                }
                Dtype::U32 => {
                    contents.integers.push((name, Array { shape, values: numbers(view.data(), u32::from_le_bytes) }));
                }
                other => return Err(malformed(format!("tensor {name} is of type {other:?}"))),
            }
        }
        if contents.floats.iter().any(|(_, array)| array.values.iter().any(|x| !x.is_finite()))
            || contents.doubles.iter().any(|(_, array)| array.values.iter().any(|x| !x.is_finite()))
        {
            return Err(malformed("it holds numbers that are not finite".into()));
        }
        Ok(contents)
    }
}

fn numbers<const SIZE: usize, T>(bytes: &[u8], number: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    bytes.chunks_exact(SIZE).map(|bytes| number(bytes.try_into().expect("bytes of one number"))).collect()
}
